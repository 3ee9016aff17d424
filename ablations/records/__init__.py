"""The format of results: columns, names of files, storage, checksums. No torch, no reducers."""
