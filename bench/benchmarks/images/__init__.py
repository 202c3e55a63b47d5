"""``ironmoe bench images``: how fast images come off the disk, how much memory that takes, and
whether an attack waits for them. ``jpegs.py`` makes the files, ``loading.py`` reads them beside a
plain loader, ``attacking.py`` attacks ViTs of ViT-S size on them; ``run.py`` keeps what is done."""
