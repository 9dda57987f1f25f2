"""Transport of models and updates, and the placement of ranks on hosts and devices."""
