"""What all of the runner rests on: errors, text, secrets, names and limits."""
