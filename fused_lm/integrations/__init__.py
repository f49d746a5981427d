"""Other people's models on our operators: one call for a model, torch's attention, Hugging Face."""
