"""The vision-language model: loading, inputs, positions, vision features, sampling, log-probabilities."""
