"""The studio: a local web page over the same editor, journal and views as the command line (``sphere-edit[studio]``)."""
