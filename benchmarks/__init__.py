"""The project's claims, each as a repeatable benchmark."""
