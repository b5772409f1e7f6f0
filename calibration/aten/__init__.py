"""From the ATen graph of torch.export to the normal form: one table, operator to converter."""
