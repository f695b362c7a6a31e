"""The page's tabs on a run's folder and on a data set."""
