"""Networks for tasks nobody trained on: a flow over neurons that reads a support set."""
