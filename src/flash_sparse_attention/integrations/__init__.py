"""Other libraries' models with sparse attention: `integrations.transformers`."""
