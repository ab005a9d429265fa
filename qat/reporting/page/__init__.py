"""The report of a run, report.html: one file that asks nothing of any network, made of what the run's folder holds."""
