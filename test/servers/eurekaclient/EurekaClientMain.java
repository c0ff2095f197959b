package regbridge;

import com.netflix.appinfo.ApplicationInfoManager;
import com.netflix.appinfo.InstanceInfo.InstanceStatus;
import java.util.Map;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.SpringBootConfiguration;
import org.springframework.boot.autoconfigure.EnableAutoConfiguration;
import org.springframework.context.annotation.Import;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestParam;
import org.springframework.web.bind.annotation.RestController;

/** An application that registers in Eureka, tells who it is, and changes what it registered when it is told to. */
@SpringBootConfiguration
@EnableAutoConfiguration
@Import(EurekaClientMain.Pages.class)
public class EurekaClientMain {
    public static void main(String[] args) {
        SpringApplication.run(EurekaClientMain.class, args);
    }

    @RestController
    static class Pages {
        private final ApplicationInfoManager self;

        Pages(ApplicationInfoManager self) {
            this.self = self;
        }

        @GetMapping("/")
        String id() {
            return self.getInfo().getInstanceId();
        }

        @PostMapping("/status")
        void status(@RequestParam String value) {
            self.setInstanceStatus(InstanceStatus.valueOf(value));
        }

        /** Adds to the metadata. */
        @PostMapping("/metadata")
        void metadata(@RequestBody Map<String, String> more) {
            self.registerAppMetadata(more);
        }
    }
}
