"""Networks: classifiers, generators and the probes that read them."""
