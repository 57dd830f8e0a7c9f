"""The server: Ray Serve over core. Write `from serve.x import y`, never `import serve`, so that `ray.serve` stays apart."""
