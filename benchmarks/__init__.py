"""The project's claims, each as something that anyone can run again."""
