"""Graph collaborative filtering: LightGCN and its family, and CLCRec with a graph term."""
