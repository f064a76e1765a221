"""Local: the Prefect and MLflow servers of this machine."""
