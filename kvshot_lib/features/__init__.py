"""Target state of documents: live, on disk, in a device's memory."""
