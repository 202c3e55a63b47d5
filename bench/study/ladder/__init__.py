"""The models of the study: what they are, how they begin, how they are trained."""
