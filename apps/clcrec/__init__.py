"""clcrec: contrastive cold-start recommendation from content (CLCRec)."""
