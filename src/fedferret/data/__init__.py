"""Data: one file per source, then templates (text to tokens) and batches (tokens to tensors).

    source -> FederatedData (the Examples of each client) -> EncodedData -> TokenisedData.batches -> Batch

``registry`` names the sources and imports no heavy library; every other module is imported on first use.
"""
