"""A prediction service: models in processes of their own, versions that take turns, and who may change that."""
