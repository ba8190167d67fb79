"""The same bits as transformers' modules, in fewer operations: fused layers, oneDNN's products, memory that stays."""
