"""What can be said of architectures whose trainings are paired by seed. The unit is the training
run: no test here takes an image for one."""
