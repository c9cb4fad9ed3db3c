"""Where shards rest between uses: on the device, or in host memory."""
