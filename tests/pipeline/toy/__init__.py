"""A tiny plugin without torch: arithmetic as stages. `TOY_LOG` names a file that counts runs."""
