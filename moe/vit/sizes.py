"""Which sizes and kinds of parts make a vision transformer."""

from ironmoe.kernels.checks import check_counts

CLASSIFIERS = ("token", "gap", "map")
STEMS = ("patch", "conv")


def check_sizes(
    image_size: int,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    *,
    stem: str,
    classifier: str,
) -> None:
    """TypeError, ValueError that name the size or the kind which does not fit."""
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {STEMS}, got {stem!r}")
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {CLASSIFIERS}, got {classifier!r}")
    check_counts(image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads)
    if dim % heads:
        raise ValueError(f"heads must divide dim = {dim}, got {heads}")
    if stem == "patch" and image_size % patch_size:
        raise ValueError(
            f"patch_size must divide image_size = {image_size} with the patch stem, got "
            f"{patch_size}"
        )
    if stem == "conv" and (patch_size < 2 or patch_size & (patch_size - 1)):
        raise ValueError(
            f"patch_size must be a power of two, 2 or more, with the conv stem, got {patch_size}"
        )
