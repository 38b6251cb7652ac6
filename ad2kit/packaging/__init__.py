"""From a gated run to a Bento, and the trial of a service over HTTP."""
