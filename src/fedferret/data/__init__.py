"""Data: one file per source, then templates (text to tokens) and batches (tokens to tensors).

    source -> FederatedData (who holds which Example) -> FederatedTokens -> TokenisedData.batches -> Batch

``registry`` names the sources and imports nothing heavy; every other module loads its libraries when used.
"""
