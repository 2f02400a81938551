"""The serving router: trained, judged and put into a folder in the form in which engines run it."""
