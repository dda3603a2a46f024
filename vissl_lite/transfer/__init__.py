"""Transfer: fine-tuning an encoder on labels."""
