"""``ironmoe bench cpu``: the MoE layer beside Hugging Face's Mixtral experts."""
