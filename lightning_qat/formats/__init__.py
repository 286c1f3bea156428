"""Writers and readers of other ecosystems' formats."""
