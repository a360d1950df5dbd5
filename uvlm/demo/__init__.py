"""The demo: from nothing to a trained model on one small machine, and the judge of its pictures."""
