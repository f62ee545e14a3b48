"""Floor 1: where a model's files, tokenizer, chat template and fingerprint come from."""
