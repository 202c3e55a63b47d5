"""Which options stand together in the help of commands that have many, and in which order."""

IMAGE_FILES = "image_size skip_bad labels class_map resize crop interpolation mean std workers"

PANELS: dict[str, dict[str, str]] = {
    "demo": {
        "Data": "data image_size skip_bad",
        "Training": "seeds seed epochs",
        "Attack": "norm eps steps alpha restarts attack_images",
        "Device": "device dtype batch_size",
        "Output": "out",
    },
    "train": {
        "Data": "data image_size skip_bad",
        "Model": "model",
        "Adversarial training": "method norm eps steps alpha mode routing",
        "Options of some methods": "beta noise replays weight routing_weight routing_beta",
        "Optimizer": "epochs batch_size parts learning_rate weight_decay schedule label_smoothing "
        "awp ema shifts seed",
        "Device": "device dtype checkpointing compile_model fsdp expert_parallel",
        "Verdict": "guard attack attack_images",
        "Output": "out",
    },
    "attack": {
        "Model": "checkpoint model weights",
        "Data": f"data everything attack_images {IMAGE_FILES}",
        "Attack": "attacks norm eps steps queries alpha restarts eot seed routing levels",
        "Verdict": "checks passes on_bad",
        "Device and time": "device expert_parallel dtype batch_size offload recompute max_seconds "
        "max_forwards",
        "Output": "out save_images",
    },
    "study": {
        "Data": "data image_size skip_bad",
        "Models": "arms trainings seeds first_seed epochs train_eps model",
        "Measurements": "quick eps images measurements certificates",
        "Run": "processes expert_parallel plan from_ out",
    },
    "bench attacks": {
        "What is measured": "parts data epochs",
        "Images and runs": "images autoattack_images runs batch_size",
        "Output": "folder out form again",
    },
    "bench scale": {
        "What is computed": "parts check throughput",
        "Layers": "shapes tokens shared layers",
        "Ranks": "ranks gpus node imbalance",
        "Machine": "gpu nvlink_gbs network_gbs memory_gb",
        "Output": "out again form",
    },
    "bench training": {
        "What is measured": "parts data",
        "Part inner": "models dtypes runs seconds",
        "Part methods": "methods seeds epochs images apgd_images apgd_steps",
        "Both": "eps folder out form",
    },
}
"""command → title → names of parameters."""
