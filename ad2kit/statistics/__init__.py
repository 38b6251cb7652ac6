"""Numbers about answers: metrics, intervals, the order of labels, how many rows show a bound."""
