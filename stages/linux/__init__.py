"""What is known of the kernel: overlay layers, mounts and namespaces, bubblewrap, edits by folder descriptor."""
