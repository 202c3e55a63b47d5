"""The engine: it takes many images through an attack, and knows no attack by name."""
