"""Drop-in replacements for what existing trainers import from other packages, one module per package."""
