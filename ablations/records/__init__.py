"""The format of results, for who writes and who reads them: columns, names, storage, checksums, intervals, tests."""
