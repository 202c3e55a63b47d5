"""What attacks are made of: pieces that several attacks share, or that would make one file long.

Nothing here is an attack by itself.
"""
