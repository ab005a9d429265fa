"""What is seen of a training: the table of metrics, statistics of layers as pure functions, and alarms, from series to words."""
