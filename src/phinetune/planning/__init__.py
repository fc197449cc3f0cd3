"""`phinetune plan`: predicts what a run will take, before it begins."""
