"""What a training does to weights beside its optimizer: perturbations, averages."""
