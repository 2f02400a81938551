"""The steps of healing: a smaller model learns from unlabelled questions to say what the original says."""
