"""The cheapest student that meets a target."""
