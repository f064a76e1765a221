"""The MLflow model registry and the furniture of deployment."""
