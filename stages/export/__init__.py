"""Write a dataset with the reference's log-probs in the form that another trainer reads."""
