"""CPU kernels, one emitter for each operator of the contract."""
