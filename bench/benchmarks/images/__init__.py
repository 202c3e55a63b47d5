"""``ironmoe bench images``: how fast images come off the disk, how much memory that takes, and
whether an attack waits for them. ``jpegs.py`` makes the files, ``loading.py`` reads them beside a
plain loader, ``vit_s.py`` makes ViTs of ViT-S size, which ``attacking.py`` attacks on them;
``run.py`` keeps what is done."""
