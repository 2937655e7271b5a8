"""Images: sources, their mixture, the loader, and the views drawn from them on the device."""
