"""The scikit-learn contract: parameters, validation, containers, fitted attributes."""
