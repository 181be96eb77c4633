"""What the scripts share: data, models, training, masks, regrowth, search and plots."""
